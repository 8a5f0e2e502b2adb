"""Figures of samples: distances, scores, precision and recall, losses."""
