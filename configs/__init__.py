"""One ml_collections config an experiment."""
