"""What a model can be served with in so much memory."""
