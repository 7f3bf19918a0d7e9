package firmwaresim_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"go.uber.org/goleak"

	firmwaresim "holdfast/firmware-sim"
	"holdfast/internal/mqtt"
	"holdfast/internal/mqtt/mqtttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func logger(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

func run(t *testing.T, cfg firmwaresim.Config) (*firmwaresim.Fleet, firmwaresim.Report) {
	t.Helper()
	f, err := firmwaresim.New(cfg, logger(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	r, err := f.Run(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return f, r
}

// sink is a server that notes what it acknowledges.
func sink(t *testing.T) (*mqtttest.Server, *firmwaresim.Arrivals) {
	a := firmwaresim.NewArrivals()
	return mqtttest.New(t, mqtttest.Script{Publish: func(client string, p *mqtt.Publish) mqtttest.Answer {
		if err := a.AddPayload(p.Payload); err != nil {
			t.Error(err)
		}
		return mqtttest.Answer{}
	}}), a
}

func versions(t *testing.T, fn func(t *testing.T, v mqtt.Version)) {
	for _, v := range []mqtt.Version{mqtt.V311, mqtt.V5} {
		t.Run("version="+v.String(), func(t *testing.T) { fn(t, v) })
	}
}

func TestFleetPublishes(t *testing.T) {
	versions(t, func(t *testing.T, v mqtt.Version) {
		s, arrived := sink(t)
		f, r := run(t, firmwaresim.Config{Broker: "mqtt://" + s.Addr, Version: v, Devices: 20, Rate: 200, Messages: 100})
		verdict := f.Ledger().Verify(arrived)
		t.Logf("\n%v%v", r, verdict)
		if r.Published != 2000 || r.Unacknowledged != 0 || verdict.Arrived != 2000 || verdict.Duplicates != 0 || !verdict.OK() {
			t.Errorf("published %d, verdict %v", r.Published, verdict)
		}
	})
}
