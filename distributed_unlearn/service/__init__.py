"""Erasure as a service: who asked, when, and what must survive. Needs the extra `service`.

A round itself is `rounds/` on an open worker group, which the service is handed and never opens.
"""
