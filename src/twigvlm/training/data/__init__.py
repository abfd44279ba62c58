"""Training samples: read, render, align, batch."""
