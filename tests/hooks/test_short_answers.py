"""Answers of one token, of the end of the text alone, and of none, through everything that scores.

Would catch: a mean over no tokens, a target at the padding, an answer of nothing that counts as one,
an interval of one example that is no number.
"""
