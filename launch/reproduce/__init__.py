"""What the speed of maskwise is measured against and with; not part of the installed package."""
