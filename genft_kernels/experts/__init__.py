"""Mixture-of-experts layers that keep all their experts' weights in one stacked tensor."""
