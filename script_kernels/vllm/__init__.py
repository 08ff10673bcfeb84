"""Visual-token pruning inside vLLM, as a plugin: install this package beside vLLM and say how much to keep.

`settings` reads and checks the configuration, `select` chooses rows and carries positions; both know no engine. What is
imported from vLLM is imported in `engine`, and used by `plugin` (what vLLM calls), `processing` (placeholders and cache
identities) and `models` (the encoder's output).
"""
