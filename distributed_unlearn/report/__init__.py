"""Progress, logs, figures and pages: reads and writes files, knows no model."""
