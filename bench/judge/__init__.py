"""A judge of pruning: a small LLaVA-like model, trained from scratch, that answers questions about composed scenes.

Bank, scenes, model and training are here. The evaluation of methods is not, nor are weights.
"""
