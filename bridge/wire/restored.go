package wire

// Restored tells that a gateway goes on from a backup (docs/formats.md): messages before Next keep their ids, those from there on
// have the new epoch.
type Restored struct {
	Gateway       string         `json:"gateway"`
	Epoch         string         `json:"epoch"`          // from now on
	PreviousEpoch string         `json:"previous_epoch"` // the backup's
	Backup        string         `json:"backup"`         // its id
	BackupMS      int64          `json:"backup_ms"`      // when it was made, Unix ms; 0: not known
	RestoredMS    int64          `json:"restored_ms"`
	Lanes         []RestoredLane `json:"lanes"`
}

// RestoredLane is where the new epoch begins in a lane.
type RestoredLane struct {
	Lane string `json:"lane"`
	Next uint64 `json:"next"`
}
