package config_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"holdfast/internal/config"
)

func TestDiffNamesWhatIsDifferent(t *testing.T) {
	const before = `
gateway: { id: gw1, data_dir: /d }
devices: { anonymous: true, roles: [{ name: pump, publish: ["dt/{device}/#"] }] }
spool:
  lanes:
    - { name: alarm, share: 50, max_bytes: 256MiB }
    - { name: telemetry, share: 50, max_bytes: 1GiB, max_age: 168h }
routes: [{ match: "alarm/#", lane: alarm }]
upstreams:
  - { name: cloud, url: "mqtt://127.0.0.1:1", format: batch }
  - { name: lab, url: "mqtt://127.0.0.1:2", format: passthrough }
log: { level: info }
`
	const after = `
gateway: { id: gw1, data_dir: /d }
devices: { anonymous: false, roles: [{ name: pump, publish: ["dt/{device}/#", "x/#"] }] }
spool:
  lanes:
    - { name: telemetry, share: 50, max_bytes: 2GiB, max_age: 168h, when_full: reject }
    - { name: alarm, share: 50, max_bytes: 256MiB }
routes: [{ match: "alarm/#", lane: alarm }, { match: "a/#", lane: none }]
upstreams:
  - { name: cloud, url: "mqtt://127.0.0.1:3", format: batch, lanes: [alarm] }
  - { name: new, url: "mqtt://127.0.0.1:4", format: passthrough, topic_prefix: "p/" }
log: { level: debug }
`
	parse := func(text string) *config.Config {
		c, _, err := config.Parse("/g.yaml", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	a, b := parse(before), parse(after)
	got := config.Diff(a, b)
	short := func(c *config.Change) { // a whole upstream is long
		if len(c.From) > 60 {
			c.From = c.From[:30]
		}
		if len(c.To) > 60 {
			c.To = c.To[:28]
		}
	}
	for i := range got {
		short(&got[i])
	}
	want := []config.Change{
		{Key: "devices.anonymous", From: "true", To: "false"},
		{Key: "devices.roles[pump].publish", From: `["dt/{device}/#"]`, To: `["dt/{device}/#", "x/#"]`},
		{Key: "spool.lanes[telemetry].max_bytes", From: "1GiB", To: "2GiB"},
		{Key: "spool.lanes[telemetry].when_full", From: "drop_oldest", To: "reject"},
		{Key: "spool.lanes", From: "order alarm, telemetry", To: "order telemetry, alarm"},
		{Key: "routes", From: `[{match: "alarm/#", lane: alarm}]`, To: `[{match: "alarm/#", lane: ala`[:28]},
		{Key: "upstreams[cloud].url", From: `"mqtt://127.0.0.1:1"`, To: `"mqtt://127.0.0.1:3"`},
		{Key: "upstreams[cloud].lanes", To: "[alarm]"},
		{Key: "upstreams[lab]", From: `{name: lab, url: "mqtt://127.0.`[:30]},
		{Key: "upstreams[new]", To: `{name: new, url: "mqtt://127.0.`[:28]},
		{Key: "log.level", From: "info", To: "debug"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if d := config.Diff(a, parse(before)); d != nil {
		t.Errorf("the same file: %v", d)
	}
}
