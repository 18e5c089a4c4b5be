"""Training and scoring of one model on one device. Nothing here depends on a federation."""
