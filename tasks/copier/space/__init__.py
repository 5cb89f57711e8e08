"""What a fork may copy, and what it will copy. In the order in which a fork uses them:

forecast    the bytes that a planned fork will copy, as far as that is known before
budget      the bytes that a fork may still copy (`max_copied_bytes`), shared by the processes that make it
"""
