"""Tables and figures made from result rows. Needs pandas, but neither Ray nor torch."""
