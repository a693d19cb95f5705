"""The pages that people browse, and the feeds. All work without JavaScript."""
