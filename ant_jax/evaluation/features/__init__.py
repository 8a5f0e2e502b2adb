"""Networks whose features samples are judged by."""
