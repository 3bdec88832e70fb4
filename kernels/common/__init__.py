"""What the compressors share: argument checks, dispatch by device, device helpers."""
