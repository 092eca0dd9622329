"""Leaping while training: propose weights ahead, verify them, keep or roll back; every proposal a row."""
