"""`make gpu`: what only a GPU can show, as one command of at most six minutes. docs/gpu.md tells how to read its table.

python -m tests.gpu --device cuda:0 --out DIR      `--device cpu` rehearses every line of it
"""
