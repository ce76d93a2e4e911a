"""Measurements with passes of their own, beside training (method.md section 6): routing drift, what sends gradient
into the shared experts, and what the model can do with shared experts only or without them.

None of them changes the run: weights, optimizer, random generators and the routers' counters are as before.
"""
