"""Twigs on disk and on the hub: save, load, describe, import the authors' own."""
