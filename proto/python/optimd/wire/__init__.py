"""What both sides share: the payload codec, dtypes, param_groups, the bucket layout, limits and error reasons.

Import from the modules; a client and a server need different parts of them. Nothing here knows a client, a server, a
socket or a thread.
"""
