"""How the report looks, in light and dark, on narrow screens and on paper."""

from typing import Final

__all__ = ["STYLE"]

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d7dce2; --paper: #fff; --card: #f6f8fa;
  --work: #2563a8; --wait: #e2a33c; --limit: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4b0; --line: #39414b; --paper: #14181d;
  --card: #1d2229; --work: #6ea8e6; --wait: #d9a04a; --limit: #f08a80; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  padding: 1.5rem 1rem 3rem; max-width: 68rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: .9rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .3rem 0; }
.loader, pre, code { font-family: ui-monospace, Menlo, Consolas, monospace; }
.loader { font-size: .85rem; overflow-wrap: anywhere; }
header p, .note, .kind { color: var(--soft); }
.note { font-size: .85rem; }
.verdict { font-size: 1.05rem; border-left: 4px solid var(--work); padding: .4rem .9rem; background: var(--card); }
.pipeline { list-style: none; margin: 0; padding: 0 0 0 1.4rem; display: flex; flex-wrap: wrap; gap: .9rem 1.6rem; }
.box { position: relative; flex: 1 1 11rem; max-width: 16rem; padding: .6rem .75rem .7rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; }
.box + .box::before { content: "\\2192"; position: absolute; left: -1.35rem; top: 50%; transform: translateY(-50%);
  color: var(--soft); }
.box.limit { border: 2px solid var(--limit); }
.box.limit h3::after { content: "the busiest"; float: right; font-weight: 400; font-size: .75rem; color: var(--limit); }
.box.consumer { border-style: dashed; }
.kind { font-size: .8rem; margin: 0; }
.rate { font-size: 1.25rem; margin: .25rem 0; }
.rate small { font-size: .8rem; color: var(--soft); }
.bar { display: grid; grid-template-columns: 2.6rem minmax(2rem, 1fr) auto; gap: .4rem;
  align-items: center; font-size: .78rem; }
.bar i, .spent i { display: flex; height: .55rem; background: var(--line); border-radius: 3px; overflow: hidden; }
.bar b, .spent b, .key.work { background: var(--work); }
.spent u, .key.wait { background: var(--wait); }
.bar .said { text-align: right; white-space: nowrap; }
.consumer .bar b { background: var(--wait); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 8rem; }
.times td, .times thead th { white-space: nowrap; }
.times .spent { width: 50%; min-width: 8rem; padding-top: .6rem; }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .35rem; }
pre { font-size: .8rem; line-height: 1.4; margin: 0; }
.waits { width: 100%; max-width: 52rem; height: auto; display: block; }
.waits text { font-size: 11px; fill: var(--soft); }
.waits line { stroke: var(--line); }
.waits rect { fill: var(--wait); }
@media (max-width: 34rem) { .pipeline { display: grid; padding: 0; gap: 1.6rem; }
  .box { max-width: none; } .box + .box::before { content: "\\2193"; left: 50%; top: -.85rem; }
  tbody th { min-width: 0; } .times .spent { width: 20%; min-width: 2.5rem; } th, td { padding-right: .5rem; }
  .waits text { font-size: 19px; } .waits text.between { display: none; } }
@media print { body { max-width: none; } }
"""
