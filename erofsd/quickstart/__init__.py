"""What the three-minute demonstration needs: a sample image, a registry to hold it, and the story."""
