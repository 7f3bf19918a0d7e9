package firmwaresim

import (
	"slices"
	"sync"
	"time"

	"holdfast/internal/mqtt"
)

// wakeSpread is the time over which a fleet that sleeps wakes up to deliver what it has.
const wakeSpread = time.Second

// Sleep takes devices off-line, all if none is named: they disconnect and keep their session, and go on
// sampling and working on their commands. They stay off-line, whatever Config.Awake says, until Wake, or until
// sampling is over. Sleep returns when the server has closed their connections, or a second later.
func (f *Fleet) Sleep(devices ...string) {
	var ended sync.WaitGroup
	f.each(devices, func(d *device) {
		if !f.draining.Load() {
			d.wakeAt = never
			d.sleep(&ended)
		}
	})
	ended.Wait()
}

// Wake ends Sleep: the devices connect at moments that are spread evenly over this time from now.
func (f *Fleet) Wake(spread time.Duration, devices ...string) {
	f.each(devices, func(d *device) {
		if d.asleep {
			d.wakeAt = f.now() + time.Duration(d.float()*float64(spread))
			f.wake(d, d.wakeAt)
		}
	})
}

// each calls do for the devices named, all if none is, under their mu.
func (f *Fleet) each(devices []string, do func(*device)) {
	for _, d := range f.devices {
		if len(devices) > 0 && !slices.Contains(devices, d.id) {
			continue
		}
		d.mu.Lock()
		do(d)
		d.mu.Unlock()
	}
}

// now is elapsed, and 0 before Run.
func (f *Fleet) now() time.Duration {
	if !f.running.Load() {
		return 0
	}
	return f.elapsed()
}

// sleepDue lets the device fall asleep or wake up as planned. Under mu, with now set.
func (d *device) sleepDue() {
	draining := d.fleet.draining.Load()
	switch {
	case d.asleep && d.wakeAt <= d.now:
		d.asleep, d.wakeAt = false, never
		d.attempt = 0
		if d.clean && d.commands != nil && d.commands.at != never && d.commands.at > d.now {
			d.connectAt = d.commands.at // it is still booting
		} else {
			d.connectAt = d.now
		}
		if awake := d.fleet.cfg.Awake; awake > 0 {
			d.restAt = d.now + awake
		}
	case !d.asleep && d.restAt <= d.now && !draining:
		d.wakeAt = d.restAt - d.fleet.cfg.Awake + time.Duration((0.95+0.1*d.float())*float64(d.fleet.cfg.Period))
		d.sleep(nil)
	}
	if draining {
		d.restAt = never
	}
}

// sleep disconnects, which ended, if it is not nil, can wait for. Who wants the device back sets wakeAt. Under mu.
func (d *device) sleep(ended *sync.WaitGroup) {
	d.asleep = true
	d.connectAt, d.restAt = never, never
	c := d.client
	if c == nil {
		return // a connection that is being made ends as soon as it is there
	}
	d.client, d.link, d.again = nil, nil, nil
	f := d.fleet
	if ended == nil {
		ended = new(sync.WaitGroup)
	}
	ended.Add(1)
	f.dialling.Go(func() {
		defer ended.Done()
		f.dials <- struct{}{}
		defer func() { <-f.dials }()
		_ = c.Disconnect(mqtt.Success) // it breaks or it ends
	})
}
