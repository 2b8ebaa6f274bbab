"""Weights from elsewhere and for others: folders, names, the hub, exports."""
