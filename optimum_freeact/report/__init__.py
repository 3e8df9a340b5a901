"""Reading the result: perplexity, tables, figures."""
