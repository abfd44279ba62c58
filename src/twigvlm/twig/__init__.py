"""The trained block that grows on layer K of a base."""
