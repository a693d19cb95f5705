"""The demo: three contributors who never meet, and a user who installs what they published."""
