package gateway_test

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/devices"
	"holdfast/internal/mqtt"
)

// letIn says whether the gateway lets an unknown client in without credentials.
func letIn(t *testing.T, r *running) bool {
	t.Helper()
	_, port, err := net.SplitHostPort(r.Addrs()[0].String())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, err := mqtt.Dial(ctx, mqtt.ClientOptions{
		Address: net.JoinHostPort("127.0.0.1", port), Connect: mqtt.Connect{Version: mqtt.V5, ClientID: "stranger"},
	})
	if err == nil {
		c.Abort()
		return true
	}
	var refused *mqtt.Refused
	if !errors.As(err, &refused) {
		t.Fatal(err)
	}
	return false
}

// The rule that no stranger comes in from the network holds for the listeners that are open, not for those that a
// restart would open.
func TestReloadKeepsStrangersOutOfOpenListeners(t *testing.T) {
	dir := t.TempDir()
	c := configuration(t, dir)
	c.Devices.Anonymous = false
	c.Listeners[0].Address = "0.0.0.0:0"
	r := start(t, c)
	if letIn(t, r) {
		t.Fatal("a stranger is let in")
	}

	next := configuration(t, dir) // anonymous, on a listener of this machine's own
	if _, err := r.Reload(next); err == nil || !strings.Contains(err.Error(), "restart") {
		t.Errorf("Reload = %v, want an error that names the way out", err)
	}
	if letIn(t, r) {
		t.Error("a stranger is let in from the network")
	}

	next.Devices.AllowAnonymousOnNetwork = true
	later, err := r.Reload(next)
	if err != nil || !slices.Contains(later, "listeners") {
		t.Errorf("Reload = %v, %v", later, err)
	}
	if !letIn(t, r) {
		t.Error("a stranger is refused although the configuration says that the network keeps them out")
	}
}

// What is wrong leaves everything as it was.
func TestReloadTakesAllOrNothing(t *testing.T) {
	dir := t.TempDir()
	c := configuration(t, dir)
	r := start(t, c)
	next := configuration(t, dir)
	next.Devices.Anonymous = false
	next.Devices.Roles = []devices.Role{{Name: "wrong", Publish: []string{"a/#/b"}}}
	if _, err := r.Reload(next); err == nil {
		t.Fatal("a wrong role is taken")
	}
	if !letIn(t, r) {
		t.Error("devices.anonymous was taken from a configuration that is wrong")
	}
}
