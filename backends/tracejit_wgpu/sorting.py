"""tmp"""
GENERATORS: dict = {}
