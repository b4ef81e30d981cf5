"""What axe-core finds wrong with a page for people who use assistive technology."""

from __future__ import annotations

VIOLATIONS = """async () => (await axe.run()).violations.filter(({ impact }) => /serious|critical/.test(impact))
  .map(({ id, nodes }) => [id, ...nodes.map(({ html, failureSummary }) => `${html} ${failureSummary}`)])"""
"""Each serious or critical kind, and where it stands."""
