"""What do four contributors of one domain lose by being merged into one expert?"""
