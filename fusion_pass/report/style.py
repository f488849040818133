"""The style sheet of the report page: light and dark, no scripts, no fonts from elsewhere."""

STYLE = """ :root { color-scheme: light dark; --ink: #1a1d21; --soft: #626a73; --line: #dde1e6; --ground:
#f6f7f9; --card: #fff; --good: #0a7d4b; --good-ground: #e4f5ec; --warn: #a15c00; --warn-ground: #fdf1de;
--bar: #b8c0ca; --accent: #0a7d4b; --gone: #fde8e8; --new: #e1f5e8; --void: #f1f2f4; } @media
(prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa3ad; --line: #30363d; --ground: #14171b;
--card: #1c2025; --good: #57d49a; --good-ground: #12382a; --warn: #f0b35c; --warn-ground: #3d2c10; --bar:
#59626d; --accent: #2fae74; --gone: #4a2022; --new: #153d29; --void: #1a1d21; } } * { box-sizing: border-box;
} body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; } main
{ max-width: 1280px; margin: 0 auto; padding: 32px 24px 64px; } h1 { font-size: 26px; margin: 0;
letter-spacing: -0.02em; } h2 { font-size: 18px; margin: 36px 0 12px; } h3 { font: 600 14px/1.4 ui-monospace,
monospace; margin: 0 0 10px; overflow-wrap: anywhere; } header .command { font: 14px ui-monospace, monospace;
margin: 6px 0 0; overflow-wrap: anywhere; } header .machine { color: var(--soft); margin: 2px 0 0; font-size:
13px; } .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
margin-top: 24px; } .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
padding: 14px 16px; } .tile b { display: block; font-size: 24px; line-height: 1.2; font-variant-numeric:
tabular-nums; } .tile span { color: var(--soft); font-size: 13px; } .note { background: var(--warn-ground);
border-radius: 8px; padding: 10px 14px; } .card { background: var(--card); border: 1px solid var(--line);
border-left: 4px solid var(--accent); border-radius: 10px; padding: 16px 18px; margin-bottom: 14px; }
.card.left { border-left-color: var(--warn); } .badge { font: 600 11px/1 system-ui, sans-serif;
text-transform: uppercase; letter-spacing: 0.05em; color: var(--good); background: var(--good-ground);
border-radius: 99px; padding: 4px 9px; margin-right: 6px; } .left .badge { color: var(--warn); background:
var(--warn-ground); } .reason { margin: 0 0 10px; font-weight: 600; } .error { color: var(--warn);
font-family: ui-monospace, monospace; font-size: 13px; } .source { background: var(--ground); border-radius:
8px; padding: 10px 12px; margin: 0 0 12px; overflow-x: auto; font: 12.5px/1.5 ui-monospace, monospace; } dl {
display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 0 0 12px; font-size: 14px; } dt
{ color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; } .bars p { margin: 0 0 4px; } .fine { color:
var(--soft); font-size: 12.5px; } .bar { display: flex; align-items: center; gap: 10px; margin: 3px 0;
font-size: 13px; } .bar span { width: 74px; color: var(--soft); } .bar i { height: 12px; min-width: 2px;
border-radius: 3px; background: var(--bar); } .bar i.with { background: var(--accent); } .bar em { font-style:
normal; font-variant-numeric: tabular-nums; } .bars .fine:last-child { margin-top: 8px; } .graph { background:
var(--card); border: 1px solid var(--line); border-radius: 10px; margin-bottom: 12px; overflow: hidden; }
.graph > summary { padding: 12px 16px; cursor: pointer; font-weight: 600; font-size: 14px; } .names, .row {
display: grid; grid-template-columns: 1fr 1fr; } .names span { padding: 4px 12px; color: var(--soft);
font-size: 12px; border-bottom: 1px solid var(--line); } .diff { font: 11.5px/1.45 ui-monospace, monospace;
overflow-x: auto; } .row code { font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; padding: 0
12px; min-height: 1.45em; border-right: 1px solid var(--line); } .row code.gone { background: var(--gone); }
.row code.new { background: var(--new); } .row code.void { background: var(--void); } .diff details > summary
{ color: var(--soft); padding: 3px 12px; cursor: pointer; background: var(--ground); }
"""
