"""Networks as users have them, each in a namespace of its own: fake addresses, NAT64, dead IPv6, odd proxies."""
