"""Speed, measured side by side: each benchmark runs both sides in one process and prints ratios and medians."""
