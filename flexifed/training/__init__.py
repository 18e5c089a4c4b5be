"""One model on one device: its local epochs and its score. Nothing here knows of a federation."""
