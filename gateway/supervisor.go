package gateway

import (
	"context"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// What a service manager is told, if there is one (sd_notify(3)): that the gateway is ready, that it reads its configuration again, that
// it stops, and, as often as it wants to hear it, that the gateway is alive. Alive is more than a process that runs: what was handed in has
// been committed, and every part answers. One that hangs is killed, and the next start is a recovery like any other.

// notify sends one state.
func (g *Gateway) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		g.log.Warn("the service manager cannot be told", "state", state, "err", err)
	}
}

// beAlive tells the watchdog that the gateway is alive, as long as it is, until ctx ends.
func (g *Gateway) beAlive(ctx context.Context) {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		g.log.Warn("the service manager's watchdog cannot be understood", "err", err)
	}
	if every <= 0 {
		<-ctx.Done()
		return
	}
	g.log.Log(ctx, slog.LevelDebug, "watchdog is told", "limit_ms", every.Milliseconds())
	tick := time.NewTicker(every / 3)
	defer tick.Stop()
	asked := make(chan error, 1)
	asking := false
	for {
		if !asking {
			asking = true
			go func() { asked <- g.alive() }()
		}
		select {
		case <-ctx.Done():
			return // who still asks ends with what it asks
		case err := <-asked:
			if asking = false; err != nil {
				g.log.Warn("not well, and the watchdog is not told", "err", err)
			} else {
				g.notify(daemon.SdNotifyWatchdog)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// alive asks every part something that needs its locks, and waits for what has been handed in to be on disk.
func (g *Gateway) alive() error {
	g.spool.Accounts()
	g.broker.Stats()
	g.devices.Counts()
	g.commands.Counts()
	for _, l := range g.uplinks.all() {
		l.bridge.Status()
	}
	return g.store.Flush()
}
