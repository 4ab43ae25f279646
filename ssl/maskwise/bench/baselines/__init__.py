"""Reference implementations that `maskwise bench` measures against."""
