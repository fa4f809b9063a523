"""Other libraries, one file each: their checkpoints, their models, their objects."""
