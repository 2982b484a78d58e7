"""A-LLMRec in JAX: a frozen recommender and a frozen language model, joined by small trained networks.

The method is that of "Large Language Models meet Collaborative Filtering: An Efficient All-round LLM-based
Recommender System" (KDD 2024, arXiv 2404.11343). docs/architecture.md says where each part of it lives.
"""

__version__ = "0.1.0"
