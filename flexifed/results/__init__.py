"""Rows of results as Parquet files, and where they lie. No Ray, no torch: whoever reads results needs neither."""
