"""The demo: three contributors work apart, and a user installs what they published."""
