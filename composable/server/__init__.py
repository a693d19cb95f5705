"""A registry with accounts, search and pages, over the layout that any static host can serve.

The database is the truth about accounts, packages and releases; a folder or a bucket holds the
bytes by digest. What is served under `/config.json`, `/catalog.jsonl`, `/index` and `/blobs` is
derived from both. Never JAX: nothing is measured here, and no tensor is loaded into a model.

Needs `pip install 'composable[server]'`.
"""
