"""The paper's claims and the demo, as commands."""
