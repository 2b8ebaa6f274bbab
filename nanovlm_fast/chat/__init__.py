"""A local web page to try a model: drop a picture, ask, see the answer and what it rests on.

python -m nanovlm_fast.chat --checkpoint RUN
"""
