"""One ml_collections config per experiment."""
