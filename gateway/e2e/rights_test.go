package e2e_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/mqtt"
	"holdfast/internal/testkit"
)

// says publishes and wants it taken, or refused as MQTT has words for it: 5 is told, a connection of 3.1.1 ends without an
// acknowledgement. It returns the device, which is another after that.
func (s *gated) says(d *device, c mqtt.Connect, topic string, qos byte, taken bool) *device {
	s.t.Helper()
	err := d.publish(s.t.Context(), topic, []byte("by "+c.ClientID), qos)
	switch {
	case taken && err != nil:
		s.t.Errorf("%s, MQTT %v, may not publish to %s with QoS %d: %v", c.ClientID, c.Version, topic, qos, err)
	case !taken && err == nil && qos > 0:
		s.t.Errorf("%s, MQTT %v, may publish to %s with QoS %d", c.ClientID, c.Version, topic, qos)
	case !taken && err != nil && c.Version == mqtt.V5 && !strings.Contains(err.Error(), mqtt.NotAuthorized.String()):
		s.t.Errorf("%s, who may not publish to %s with QoS %d, is told: %v", c.ClientID, topic, qos, err)
	}
	if d.client.Err() == nil {
		return d
	}
	if c.Version == mqtt.V5 || taken {
		s.t.Errorf("%s, MQTT %v, is disconnected for a publish to %s: %v", c.ClientID, c.Version, topic, d.client.Err())
	}
	return s.in(c)
}

// TestRights has devices do what their role allows, and what it does not.
func TestRights(t *testing.T) {
	t.Parallel()
	const roles = `{ roles: [ { name: writer, publish: ["#"] }, { name: reader, subscribe: ["dt/+/temp", "twin/#"] } ] }`
	s := startGated(t, testkit.GatewayConfig{Devices: roles})
	got := newMailbox()
	watch := s.in(login(mqtt.V5, "watch", s.register("watch", map[string]any{"role": "monitor"}).Secret), hears(got))
	if r := watch.subscribe(t, "#", "$share/g/alarm/#", "$SYS/#"); r[0].Failed() || r[1].Failed() || !r[2].Failed() {
		t.Errorf("who may see all is told %v", r)
	}
	writer := login(mqtt.V5, "writer", s.register("writer", map[string]any{"role": "writer"}).Secret)
	for _, v := range versions {
		// Where only the gateway speaks nobody does, whatever the role says.
		c := login(v, "writer", string(writer.Password))
		w := s.in(c)
		for _, topic := range []string{"$SYS/x", "$share/g/x", "gw", "gw/" + gatewayID + "/state", "gw/x", "cmd/writer/req", "cmd/writer/req/1/reboot", "cmd/watch/req/1/reboot"} {
			w = s.says(w, c, topic, 1, false)
		}
		for _, topic := range []string{"gww/x", "cmd", "cmd/x", "cmd/x/other", "anything"} {
			w = s.says(w, c, topic, 1, true)
			got.until(t, topic)
		}

		id := fmt.Sprintf("pump-%d", v)
		c = login(v, id, s.register(id, nil).Secret)
		heard := newMailbox()
		d := s.in(c)
		listens := s.in(login(v, "reader-"+id, s.register("reader-"+id, map[string]any{"role": "reader"}).Secret), hears(heard))
		if r := listens.subscribe(t, "dt/+/temp", "dt/a/temp", "twin/+/x", "dt/#", "dt/+/+", "$share/g/dt/+/temp", "$share/g/#"); !slices.Equal(failed(r),
			[]bool{false, false, false, true, true, false, true}) {
			t.Errorf("a reader, MQTT %v, is told %v", v, r)
		}
		for qos := byte(0); qos <= 2; qos++ {
			for _, topic := range []string{"dt/a/temp", "dt", "alarm/fire", "local/x", "telemetry/x", "twin/" + id + "/x"} {
				d = s.says(d, c, topic, qos, true)
				got.until(t, topic)
			}
			for _, topic := range []string{
				"other", "dtx", "twin/other/x", "twin/" + id + "x/x", "twin", "cmd/other/res/1/succeeded", "cmd/" + id + "/req/1/reboot", "cmd/" + id + "x/res/1/failed",
				"gw/" + gatewayID + "/evt/gap", "$SYS/x",
			} {
				d = s.says(d, c, topic, qos, false)
			}
		}
		d = s.says(d, c, "cmd/"+id+"/res/1/succeeded", 1, true) // it is not believed, which is another matter
		d = s.says(d, c, "dt/fence", 1, true)
		for _, l := range got.until(t, "dt/fence") {
			if l.topic != "cmd/"+id+"/res/1/succeeded" {
				t.Errorf("%s has got through, on %s", l.payload, l.topic)
			}
		}

		if r := d.subscribe(t, "cmd/"+id+"/req/#", "cmd/"+id+"/req/+/reboot", "twin/"+id+"/#", "twin/"+id+"/x/+", "$share/g/twin/"+id+"/#"); slices.Contains(failed(r), true) {
			t.Errorf("MQTT %v: what a device may subscribe to is answered %v", v, r)
		}
		if r := d.subscribe(t, "#", "+/#", "+/+/req/#", "dt/#", "cmd/#", "cmd/+/req/#", "cmd/other/req/#", "cmd/"+id+"/#", "cmd/"+id+"/res/#", "twin/#", "twin/+/x", "twin/other/#",
			"$share/g/#", "$share/g/cmd/+/req/#", "$share/g/twin/other/#", "$SYS/#", "gw/#"); slices.Contains(failed(r), false) {
			t.Errorf("MQTT %v: what a device may not subscribe to is answered %v", v, r)
		} else if v == mqtt.V5 && slices.ContainsFunc(r, func(r mqtt.Reason) bool { return r != mqtt.NotAuthorized }) {
			t.Errorf("what a device may not subscribe to is answered %v", r)
		}

		// Wills are looked at when they are made.
		for topic, allowed := range map[string]bool{
			"dt/" + id + "/died": true, "twin/" + id + "/died": true, "twin/other/died": false, "gw/" + gatewayID + "/evt/x": false, "cmd/" + id + "/req/1/x": false, "$SYS/x": false,
		} {
			last := c
			last.Will = &mqtt.Will{Topic: topic, Payload: []byte("died"), QoS: 1}
			if !allowed {
				s.out(mqtt.NotAuthorized, "with a will on "+topic, last)
				continue
			}
			s.in(last).close()
			got.until(t, topic)
		}

		// A retained message that is refused is kept for nobody.
		d = s.in(c)
		for _, topic := range []string{"dt/kept/temp", "twin/other/x"} { // the second one ends a connection of MQTT 3.1.1
			allowed := topic == "dt/kept/temp"
			if err := d.send(t.Context(), &mqtt.Publish{Topic: []byte(topic), Payload: []byte("kept"), QoS: 1, Retain: true}); (err == nil) != allowed {
				t.Errorf("retained on %s: %v", topic, err)
			}
		}
		late := newMailbox()
		again := s.in(login(v, "late-"+id, s.register("late-"+id, map[string]any{"role": "reader"}).Secret), hears(late))
		again.subscribe(t, "twin/#")
		again.subscribe(t, "dt/+/temp")
		if l := late.next(t); l.topic != "dt/kept/temp" || !l.retain {
			t.Errorf("kept is %+v", l)
		}
		// What the reader heard is what it may hear.
		heard.until(t, "dt/kept/temp")
	}
}

func failed(reasons []mqtt.Reason) (f []bool) {
	for _, r := range reasons {
		f = append(f, r.Failed())
	}
	return f
}

// TestRolesChangeUnderLiveConnections changes roles by SIGHUP: what they allow holds at once for who is connected, and roles that
// are wrong change nothing.
func TestRolesChangeUnderLiveConnections(t *testing.T) {
	t.Parallel()
	const before = `{ roles: [ { name: writer, publish: ["#"] }, { name: odd, publish: ["dt/#"] } ] }`
	s := startGated(t, testkit.GatewayConfig{Devices: before})
	w := s.in(login(mqtt.V5, "writer", s.register("writer", map[string]any{"role": "writer"}).Secret))
	got := newMailbox()
	pump := login(mqtt.V5, "pump", s.register("pump", nil).Secret)
	pump.Will = &mqtt.Will{Topic: "alarm/pump", Payload: []byte("died"), QoS: 1}
	d := s.in(pump, hears(got))
	d.subscribe(t, "twin/pump/#", "cmd/pump/req/#")
	watched := newMailbox()
	watch := s.in(login(mqtt.V5, "watch", s.register("watch", map[string]any{"role": "monitor"}).Secret), hears(watched))
	watch.subscribe(t, "#")
	odd := s.in(login(mqtt.V5, "odd", s.register("odd", map[string]any{"role": "odd"}).Secret))
	writes := func(topic string) {
		t.Helper()
		if err := w.publish(t.Context(), topic, nil, 1); err != nil {
			t.Fatal(err)
		}
	}
	writes("twin/pump/1")
	got.until(t, "twin/pump/1")

	configure := func(devices string) {
		t.Helper()
		if err := s.Configure(testkit.GatewayConfig{Devices: devices, YAML: logYAML}); err != nil {
			t.Fatal(err)
		}
	}
	configure(`{ roles: [ { name: device, publish: ["dt/{device}/#"], subscribe: ["new/#", "cmd/{device}/req/#"] }, { name: writer, publish: ["#"] } ] }`)
	if !s.Reload() {
		t.Fatal("good roles are refused")
	}
	if reason := gone(t, odd, "its role is no longer there"); reason != mqtt.AdministrativeAction {
		t.Errorf("it is told %v", reason)
	}
	d = s.says(d, pump, "dt/pump/temp", 1, true)
	d = s.says(d, pump, "dt/other", 1, false)
	d = s.says(d, pump, "twin/pump/x", 1, false)
	if r := d.subscribe(t, "twin/pump/#", "new/#"); !slices.Equal(failed(r), []bool{true, false}) {
		t.Errorf("subscriptions are answered %v", r)
	}
	writes("twin/pump/2")
	writes("new/x")
	if before := got.until(t, "new/x"); len(before) > 0 {
		t.Errorf("a subscription that was withdrawn brings %v", before)
	}
	// Its command topic is still its own.
	order(t, s.Gateway, "pump", "c1", nil)
	got.until(t, "cmd/pump/req/c1/work")
	// Its will was good when it came and is not now.
	d.close()
	testkit.Eventually(t, 10*time.Second, "the pump is gone", func() bool { st, err := s.Status(); return err == nil && st.Devices.Connected == 2 })
	writes("dt/fence")
	for _, l := range watched.until(t, "dt/fence") {
		if l.topic == "alarm/pump" {
			t.Error("a will is published to a topic that its device may no longer publish to")
		}
	}

	for _, wrong := range []string{
		`{ roles: [ { name: device, publish: ["dt/#/x"] } ] }`, `{ roles: [ { name: device }, { name: device } ] }`, `{ roles: [ { name: device, publsh: [] } ] }`, `{ roles: [`,
	} {
		configure(wrong)
		if s.Reload() {
			t.Errorf("%s is taken", wrong)
		}
	}
	pump.Will = nil
	d = s.in(pump)
	d = s.says(d, pump, "dt/pump/temp", 1, true)
	d = s.says(d, pump, "twin/pump/x", 1, false)
	stays(t, w, "roles that are wrong")
	stays(t, d, "roles that are wrong")
}
