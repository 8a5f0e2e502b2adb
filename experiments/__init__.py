"""Commands that test the claims of the paper, and the demo."""
