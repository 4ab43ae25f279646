"""Multi-token attention pooling (MAP): classifier heads and their parts."""
