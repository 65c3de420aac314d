"""How a loaded model is asked: it generates answers (transformers or vLLM), or gives the likelihood of given tokens.

Start reading at `generation`, which defines the prompts and answers that both generating backends exchange.
"""
