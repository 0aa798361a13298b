"""The clients' own loading code, asked about a checkpoint: what it puts where, under the class that config.json
names.
"""
