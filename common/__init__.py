"""What no paper mentions: devices, run folders, pictures, datasets, trained classifiers."""
